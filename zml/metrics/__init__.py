"""What every role shows to Prometheus: a catalog of metrics, and who serves them.

catalog     every metric, declared once: what it is called, what it counts, who has it
"""
