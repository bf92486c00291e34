"""What the README's figures come from. ``python -m benchmarks [NAME…]`` prints tables; ratios hold, times are noisy."""
