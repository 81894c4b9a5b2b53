"""The scheduler: events in, actions out. It reads no clock, opens no socket and rolls no dice.

    for action in machine.handle(event, now): await self.perform(action)

`machine` decides for all jobs of a coordinator and is the place to begin reading; `state` holds its tables, `leases`
who was heard lately, `membership` who is who, `admission` who may come in, `explain` the sentences. `staleness` is the
gate of a shard, `batches` the data ledger of a job, `ring` the placement of chunks. Time comes in as `now`, a deadline
goes out of `next_deadline()`; every action says why, in a sentence for people.
"""
