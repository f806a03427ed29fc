"""What several test folders need: healthy records without a training, and an engine that trains nothing."""
