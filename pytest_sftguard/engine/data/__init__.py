"""The rows that a target trains on, as token ids and labels, and the questions in them; read when a run is over."""
