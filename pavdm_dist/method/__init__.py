"""The paper: levels, the window plan and its micro-batches, the window's state and the loop in one process."""
