"""Why one run went wrong: counterfactual forks of a replayed run, from its symptom to the cells that caused it."""
