"""The parts of a running engine, and how it starts and ends."""

from dataclasses import dataclass

from workers.engine.config import EngineConfig
from workers.engine.metrics import EngineMetrics
from workers.engine.residency import Residency
from workers.engine.scheduler import Limits, Scheduler
from workers.engine.snapshots import SnapshotCache
from workers.engine.tokenizers import Tokenizers
from workers.fetch import BlobReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    config: EngineConfig
    residency: Residency
    scheduler: Scheduler
    metrics: EngineMetrics
    tokenizers: Tokenizers

    def start(self) -> None:
        self.scheduler.start()

    def stop(self) -> None:
        """Answer what there is, for as long as the settings allow, then end."""
        self.scheduler.drain(self.config.drain_s)
        self.scheduler.stop()
        self.residency.close()


def open_engine(config: EngineConfig, blobs: BlobReader) -> Engine:
    metrics = EngineMetrics()
    limits = Limits(
        max_sequences=config.max_sequences,
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        max_waiting_tenant=config.max_waiting_tenant,
        prefill_tokens=config.prefill_chunk_tokens,
    )
    snapshots = SnapshotCache(config.cache_dir, blobs)
    return Engine(
        config=config,
        residency=Residency(snapshots, config, metrics),
        scheduler=Scheduler(limits, metrics),
        metrics=metrics,
        tokenizers=Tokenizers(snapshots),
    )
