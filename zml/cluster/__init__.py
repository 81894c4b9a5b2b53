"""One coordinator for many jobs: `zml coordinator --cluster FOLDER`.

    zml submit -> HTTP -> `desk` -> scheduler.cluster (events in, plans out) -> `attempts`, `nodes`
    zml node   -> a machine that offers its resources, and starts workers and shards there when told; what they print
                  is kept with the job: by themselves, or `sending` -> `storing` where the folder is not shared

Every attempt of a job is a coordinator of its own within the process, with a run directory of its own, as `zml run`
makes one: what is known of one job's training is known there and nowhere else.
"""
