"""How many visual tokens a live camera can afford; `controller` decides, `pareto` compares."""
