"""What the engine counts, in the text format that Prometheus reads."""

import threading
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

# A label takes at most this many values; the rest are counted together.
MAX_LABEL_VALUES = 64
_OTHER = "other"
_PREFIX = "deltacome_engine_"
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)

Labels = tuple[tuple[str, str], ...]


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _line(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{key}="{_escape(text)}"' for key, text in labels)
    return f"{name}{{{inside}}} {value:g}" if inside else f"{name} {value:g}"


@dataclass(kw_only=True)
class Metric:
    """One name with its series; counters only grow, gauges are set."""

    name: str
    text: str
    kind: str = "counter"
    _series: dict[Labels, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def _labels(self, labels: dict[str, str]) -> Labels:
        found = tuple(sorted(labels.items()))
        if found in self._series or len(self._series) < MAX_LABEL_VALUES:
            return found
        return tuple((key, _OTHER) for key, _ in found)

    def add(self, amount: float, **labels: str) -> None:
        with self._lock:
            key = self._labels(labels)
            self._series[key] = self._series.get(key, 0) + amount

    def set(self, value: float, **labels: str) -> None:
        with self._lock:
            self._series[self._labels(labels)] = value

    def value(self, **labels: str) -> float:
        with self._lock:
            return self._series.get(tuple(sorted(labels.items())), 0)

    def lines(self) -> Iterator[str]:
        with self._lock:
            series = dict(self._series)
        for labels, value in sorted(series.items()) or [((), 0.0)]:
            yield _line(self.name, labels, value)


@dataclass(kw_only=True)
class Histogram:
    """How often a value was at most each bound, with sum and count."""

    name: str
    text: str
    bounds: tuple[float, ...] = _SECONDS
    kind: str = "histogram"
    _series: dict[Labels, list[float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def observe(self, value: float, **labels: str) -> None:
        with self._lock:
            key = tuple(sorted(labels.items()))
            if key not in self._series and len(self._series) >= MAX_LABEL_VALUES:
                key = tuple((name, _OTHER) for name, _ in key)
            # Counts below each bound and beyond all of them, then the sum.
            row = self._series.setdefault(key, [0.0] * (len(self.bounds) + 2))
            row[bisect_left(self.bounds, value)] += 1
            row[-1] += value

    @property
    def mean(self) -> float:
        with self._lock:
            count = sum(sum(row[:-1]) for row in self._series.values())
            return sum(row[-1] for row in self._series.values()) / count if count else 0.0

    def count(self, **labels: str) -> int:
        with self._lock:
            return int(sum(self._series.get(tuple(sorted(labels.items())), [0.0, 0.0])[:-1]))

    def lines(self) -> Iterator[str]:
        with self._lock:
            series = {key: list(row) for key, row in self._series.items()}
        for labels, row in sorted(series.items()):
            total = 0.0
            for bound, count in zip((*map(str, self.bounds), "+Inf"), row[:-1], strict=True):
                total += count
                yield _line(f"{self.name}_bucket", (*labels, ("le", bound)), total)
            yield _line(f"{self.name}_sum", labels, row[-1])
            yield _line(f"{self.name}_count", labels, total)


class EngineMetrics:
    """Every series of the engine; the tenant's label is the key of its model, not its name."""

    def __init__(self) -> None:
        self._all: list[Metric | Histogram] = []
        self.generated_tokens = self._counter("generated_tokens", "Tokens chosen.")
        self.prefill_tokens = self._counter("prefill_tokens", "Tokens of prompts that were read.")
        self.found_tokens = self._counter(
            "found_tokens", "Tokens of prompts that another answer had read already."
        )
        self.steps = self._counter("steps", "Forward passes.")
        self.refused = self._counter("refused", "Requests answered with 429.")
        self.preemptions = self._counter("preemptions", "Answers that lost their pages for a time.")
        self.cold_loads = self._counter("cold_loads", "Models brought into memory.")
        self.evictions = self._counter("evictions", "Models that left memory for others.")
        self.load_failures = self._counter("load_failures", "Models that could not be served.")
        self.running = self._gauge("running", "Answers in the cache.")
        self.waiting = self._gauge("waiting", "Answers that wait for a place.")
        self.resident = self._gauge("resident_models", "Models in memory.")
        self.resident_bytes = self._gauge("resident_bytes", "Bytes of the models in memory.")
        self.preparing = self._gauge("preparing_kernels", "1 while kernels are compiled.")
        self.kv_pages_used = self._gauge("kv_pages_used", "Pages of keys and values in use.")
        self.batch_sequences = self._histogram(
            "batch_sequences", "Answers in a step.", bounds=_SIZES
        )
        self.batch_tenants = self._histogram("batch_tenants", "Tenants in a step.", bounds=_SIZES)
        self.step_seconds = self._histogram("step_seconds", "Time of a step.")
        self.load_seconds = self._histogram("load_seconds", "Time to bring a model into memory.")
        self.prepare_seconds = self._histogram(
            "prepare_seconds", "Time to compile the kernels of a kind of delta."
        )
        self.queue_seconds = self._histogram("queue_seconds", "Wait for a place, by tenant.")
        self.answer_seconds = self._histogram("answer_seconds", "Time from request to last token.")

    def _counter(self, name: str, text: str) -> Metric:
        metric = Metric(name=f"{_PREFIX}{name}_total", text=text)
        self._all.append(metric)
        return metric

    def _gauge(self, name: str, text: str) -> Metric:
        metric = Metric(name=f"{_PREFIX}{name}", text=text, kind="gauge")
        self._all.append(metric)
        return metric

    def _histogram(
        self, name: str, text: str, *, bounds: tuple[float, ...] = _SECONDS
    ) -> Histogram:
        metric = Histogram(name=f"{_PREFIX}{name}", text=text, bounds=bounds)
        self._all.append(metric)
        return metric

    def observe_step(
        self, *, n_sequences: int, n_tenants: int, prefill_tokens: int, seconds: float
    ) -> None:
        self.steps.add(1)
        self.prefill_tokens.add(prefill_tokens)
        self.batch_sequences.observe(n_sequences)
        self.batch_tenants.observe(n_tenants)
        self.step_seconds.observe(seconds)

    def render(self) -> str:
        """Every series in the text exposition format, version 0.0.4."""
        lines: list[str] = []
        for metric in self._all:
            lines += [f"# HELP {metric.name} {metric.text}", f"# TYPE {metric.name} {metric.kind}"]
            lines += metric.lines()
        return "\n".join(lines) + "\n"
