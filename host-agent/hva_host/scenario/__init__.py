"""Playing scenarios: launch a VM, play the steps, report, shut down."""
