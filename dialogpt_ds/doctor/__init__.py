"""The doctor: what of the hosts, their software and the configuration would keep a run from training, before it starts."""
