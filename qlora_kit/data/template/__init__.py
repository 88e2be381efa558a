"""Chat templates, and where the answers are in what they write."""
