"""Naming the examples of a row: the names lead back to the very tokens."""

from pathlib import Path

from dialogpt_ds.order.mixture import MixturePosition
from dialogpt_ds.order.places import Place, examples_in, listed
from dialogpt_ds.shards.reader import ShardDirectory
from tests.helpers.streams import EOS, contents, directory_of, key_of, mixture_of


def test_every_example_of_every_row_is_found_where_it_is_said_to_lie(tmp_path: Path) -> None:
    directories = [
        directory_of(tmp_path / "a", 90, 7, 4_000),
        directory_of(tmp_path / "b", 60, 9, 4_000, first_id=1_000),
    ]
    stream = mixture_of(directories, key_of(directories, (2, 1)))
    batch = stream.batch(MixturePosition.start(2), 30)
    by_name = {directory.name: directory for directory in directories}
    for row, tokens in enumerate(contents(batch)):
        places = examples_in(batch.rows, row)
        said = [token for place in places for token in _tokens(by_name[place.directory], place)]
        assert list(tokens[: len(said)]) == said
        assert all(token == EOS for token in tokens[len(said) :]), "what is left over is padding"
        assert all((Path(place.directory) / place.shard).is_file() for place in places)


def _tokens(directory: ShardDirectory, place: Place) -> list[int]:
    assert directory.manifest.shardlist[int(directory.index.shard[place.block])].url == place.shard
    return directory.block(place.block).examples(place.example, place.example + 1).tokens.tolist()


def test_a_list_of_places_is_grouped_by_shard_and_bounded() -> None:
    places = [Place("data/", "shard-000001.tar", 12, number) for number in range(10)] + [
        Place("data", "shard-000000.tar", 3, 4)
    ]
    assert listed(places) == (
        "data/shard-000001.tar examples 12:0 12:1 12:2 12:3 12:4 12:5 12:6 12:7 and 2 more; data/shard-000000.tar "
        "examples 3:4"
    )
