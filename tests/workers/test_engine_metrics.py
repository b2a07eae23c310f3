import re

from workers.engine.metrics import MAX_LABEL_VALUES, EngineMetrics, Histogram, Metric

LINE = re.compile(r'^[a-z_]+(\{[a-z_]+="[^"]*"(,[a-z_]+="[^"]*")*\})? [-+0-9.e]+$')


def test_every_line_is_what_prometheus_reads():
    metrics = EngineMetrics()
    metrics.queue_seconds.observe(0.2, tenant="abc")
    metrics.load_failures.add(1, code="canary_failed")
    metrics.observe_step(n_sequences=3, n_tenants=2, prefill_tokens=10, seconds=0.02)
    text = metrics.render()
    for line in text.splitlines():
        assert line.startswith(("# HELP ", "# TYPE ")) or LINE.match(line), line
    assert 'deltacome_engine_load_failures_total{code="canary_failed"} 1' in text
    assert "deltacome_engine_prefill_tokens_total 10" in text


def test_a_histogram_counts_up_to_each_bound():
    histogram = Histogram(name="h", text="", bounds=(1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert list(histogram.lines()) == [
        'h_bucket{le="1.0"} 2',
        'h_bucket{le="2.0"} 3',
        'h_bucket{le="+Inf"} 4',
        "h_sum 12",
        "h_count 4",
    ]
    assert histogram.mean == 3.0


def test_tenants_beyond_the_limit_are_counted_together():
    metric = Metric(name="m", text="")
    histogram = Histogram(name="h", text="")
    for number in range(MAX_LABEL_VALUES + 10):
        metric.add(1, tenant=str(number))
        histogram.observe(1, tenant=str(number))
    assert metric.value(tenant="other") == histogram.count(tenant="other") == 10
    assert metric.value(tenant="3") == 1
    assert len(list(metric.lines())) == MAX_LABEL_VALUES + 1


def test_what_would_break_a_line_is_escaped():
    metric = Metric(name="m", text="")
    metric.add(1, tenant='odd "name"\\ of\ntwo lines')
    assert list(metric.lines()) == ['m{tenant="odd \\"name\\"\\\\ of\\ntwo lines"} 1']
