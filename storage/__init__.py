"""Files written so that no crash loses them, and read without running what they hold."""
