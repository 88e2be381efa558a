"""What lies beside an exported artifact so that it is served as it was trained."""
