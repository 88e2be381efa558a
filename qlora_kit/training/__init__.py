"""SFT on TRL's SFTTrainer."""
