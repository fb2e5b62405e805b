"""The doctor: what of the hosts, their software and the configuration would keep a run from training, before it starts.

To be read in this order:

- examination: all checks in the order of the report, and what each needs of the others.
- configuration: the command line, and the run that it means. report: a finding, and how it is printed. tasks: checks
  that may hang.
- survey: asking all hosts side by side, over ssh; host_facts: what runs on a host then, and reads all that it says of
  itself; facts: its answer; meeting: what runs on the hosts meanwhile, for the network between them.
- The checks, pure functions of those answers: hosts, network, software, gpus, limits. What the trainer looks at too
  they leave to launching/machine_checks.py. run_inputs opens model, tokenizer and shards as the trainer does it.
"""
