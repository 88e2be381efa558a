"""Files, folders and hub ids -> raw rows, in bounded memory."""
