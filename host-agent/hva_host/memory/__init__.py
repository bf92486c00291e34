"""Mechanisms of guest memory: userfaultfd, backing, ledger, layers. Knows nothing of VMs."""
