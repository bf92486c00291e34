"""The guest agent: scans page states, reports them, runs commands where allowed. Stdlib only, Python >= 3.9."""
