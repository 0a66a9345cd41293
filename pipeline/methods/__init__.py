"""What is trained: phases as data, with losses, random streams and schedules."""
