"""What other programs need to show and watch a cluster: made from the catalog of metrics, written by one command.

promql      queries from the catalog's entries
panels      which dashboards there are, and what is on them
grafana     the same as Grafana's JSON, and what provisions it
rules       the alerts
prometheus  where Prometheus finds the processes
collector   an OpenTelemetry collector
emit        YAML that people like to read
export      all of it as files

The configurations of Fluentd and Fluent Bit lie here as they are.
"""
