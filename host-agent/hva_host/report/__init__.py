"""What a run has to say: one model, shown as a table, a JSON file and a picture. Pure but for writing the files."""
