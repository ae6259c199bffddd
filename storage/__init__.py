"""Files written so that no crash loses them, read without running them; and what memory is left."""
