"""The same scenario under several methods of giving a guest's memory back, one after the other."""
