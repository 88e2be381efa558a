"""Loss, fidelity, tasks and speed of every artifact."""
