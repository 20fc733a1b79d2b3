"""Official archives unpacked and whole folders checked."""
