"""What is reclaimed, from whom and when: arithmetic over samples. No I/O, no clock, no asyncio.

:func:`hva_host.policy.decide.decide` takes what was remembered (:mod:`~hva_host.policy.state`), what was seen
(:mod:`~hva_host.policy.samples`) and the limits a user set, and returns what to remember and what to do
(:mod:`~hva_host.policy.decisions`). ``docs/policy.md`` explains it in words.
"""
