"""The pager process: one per VM, one thread that owns every change of guest memory and ledger. No asyncio, no QMP."""
