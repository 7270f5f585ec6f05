"""Choose how many visual tokens a camera can afford; `controller` decides, `pareto` compares."""
