"""What the systems beside the story model are worth, one file a system (`evaluate_systems.py`)."""
