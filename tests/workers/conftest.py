import pytest
from engines import Caller, Models, make_engine, serve


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    made = Models(tmp_path_factory.mktemp("models"))
    made.add_delta("one", seed=1)
    made.add_delta("two", seed=2, new_rows=3)
    return made


@pytest.fixture(scope="session")
def engine_url(models):
    with serve(make_engine(models.root)) as url:
        yield url


@pytest.fixture
def engine(engine_url, models):
    with Caller(engine_url, models) as caller:
        yield caller
