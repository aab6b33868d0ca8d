"""The policy.yml that a new startup kit of a site holds."""

from __future__ import annotations

TEMPLATE = """\
# What may leave this site, and whose jobs it takes part in. This file overrules every job. Changes take effect with the
# next round. Lines that begin with # are examples and have no effect.

# Filters that always run on updates, after the job's own, in this order.
filters: []
#  - {name: ExcludeVars, names: ["head.*"]}
#  - {name: AllowMetrics, names: [loss, train_loss]}
#  - {name: RoundMetrics, decimals: 2}
#  - {name: Examples, equal: true}

# Name patterns of the tensors that may leave this site. `exchange: adapters` stands for those of PEFT adapters.
# exchange: ["encoder.*"]

# Whether this site's own weights may become the initial global model. Filters are not applied to them. Without this
# line those may with which its script begins, and the results of earlier jobs as far as min_cohort allows.
# initial: false

# Of how many sites' updates every model must be made that this site takes part in, this site's own update included.
min_cohort: 2

# Largest ratio between the factors that a job's site_weights give to two sites.
site_weights: 10

# Largest share of one site in the weights of a model. Sites above it are scaled down. 0.5 needs two sites, 0.4 three.
# max_share: 0.5

# Smallest fraction of the sites that a job may draw for a round.
# fraction: 0.2

# Whether this site takes part in jobs with cross_site: there, the other sites evaluate this site's model on their data.
# Without this line it does so only where min_cohort is 1.
# cross_site: true

# Whether this site may send the small files that a model needs beside its weights to the server: config.json and the
# tokenizer of Hugging Face. With them, from_pretrained opens what `fl-adapters job download` fetches. They hold label
# names, and a vocabulary that was made from this site's data holds words of it. `false` keeps them here, as does a file
# without this line; name patterns choose.
share_files: true
# share_files: ["*config.json"]

# Whether another site may get this site's updates, to average them (strategy swarm), and whether other sites may get
# this site's own trees, or parts of its gradient histograms (XGBoost). Without these lines only where min_cohort is 1.
# swarm: true
# trees: true

# `required` refuses jobs in which the server sees this site's own updates, in place of the sum over the sites alone.
# secure_sum: required

# Share of the sites around this one that can open the masks of its update together, if it drops out of a secure sum.
# sum_threshold: 0.6

# Whether others see this site's own metrics and number of examples: in history, events, reports and while they follow a
# job. `false` shows those of all sites of its jobs together, and of no site alone.
# site_metrics: false

# Fewest rows of this site behind any number of a subgroup when given models are scored on its data; 10 without this
# line. `evaluation: false` takes no part in such scores.
# evaluation: {smallest_cell: 20}

# Whether the server is told, at most once a second, how far this site is within a round (its steps of the budget), and
# with each update for how long it has trained. Those who follow the job see it. `false` tells neither.
# progress: false

# What statistics (`fl_adapters.statistics`, `fl-adapters stats`) may tell of this site's rows: no number of fewer rows
# than smallest_count, of which columns, and whether others see this site's alone. With epsilon, noise is added to every
# count, and columns of numbers need bounds. `statistics: false` tells nothing. Without this line, smallest_count is 10
# and per_site is false.
# statistics: {smallest_count: 10, per_site: false, features: ["age", "lab_*"], epsilon: 1.0, bounds: {age: [0, 110]}}

# Largest update of one round, in bytes.
# max_round_bytes: 100_000_000

# Whether to send the text of an error or of another reason when this site leaves. It may quote data, such as a name.
# Without it, the server and the other sites see the class of the error only.
# reasons: true

# Whether to send the versions of this site's software.
# info: false

# Whether the labels, tokens and feature names in which sites differ are shown to the server and the other sites.
# Without it, sites are compared by digests of 64 entries, and an error tells positions only.
# names: false

# Privacy budget over all jobs: the largest total that filters with a ledger may spend (epsilon protects this site's
# whole update of a round), and the same again that DP-SGD may spend (epsilon protects a single record).
# privacy: {epsilon: 8.0, delta: 1.0e-5}

# Strategies and adapters that may be used.
# strategies: [fedavg]
# adapters: [hf, lightning]

# Whose jobs this site takes part in.
# submitters: {roles: [lead, project-admin], organisations: own}

# Hold every job until somebody at this site has looked at it and says `fl-adapters site approve JOB`.
# approve: ask

# The local command for a job's `app`, used by `fl-adapters site`, and by `fl-adapters run` without a command.
# apps: {tumour: "python /opt/train/train_federated.py"}

# Where this site's own data lie, which fl_adapters.site().data tells its scripts: an absolute path or an address, or
# one for each app, as in {tumour: /srv/ct, stroke: /srv/mr}. A job whose data are not there is refused.
# data: /srv/study/patients.csv

# Devices that commands see, and how many commands may run at a time; `fl-adapters site` divides the devices among them.
# memory_gb: memory for the jobs of `fl-adapters site` together, for jobs that say what they use.
# resources: {gpus: ["0"], processes: 1, memory_gb: 64}

# Whether those who follow a job see the site daemon's own lines about it, never output of the script.
# share_logs: false

# Where this machine tracks this site's own part in a job: its own metrics by round, and the models that it keeps.
# Without this line a site tracks nothing, whatever a job says.
# track: ["mlflow:sqlite:////var/lib/fl-adapters/mlflow.db"]

# Syslog server that gets every line of the audit log as it is written: udp://, tcp:// or tls://HOST:PORT.
# syslog: "tls://logs.example.org:6514?ca=/etc/ssl/logs.pem"
"""
