"""How a model is cut into stages, how long that takes and on what to run it: costs, closed forms and a simulator."""
