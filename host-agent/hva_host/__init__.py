"""The host's side: launching, reclaiming, paging, telling."""
