"""bitsandbytes folders: NF4 and int8, loaded as they are stored."""
