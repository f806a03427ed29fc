"""Long studies of the guard's verdicts, such as its rate of false alarms."""
