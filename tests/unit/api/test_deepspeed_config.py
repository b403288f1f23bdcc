"""Our tables of DeepSpeed's keys against the DeepSpeed that is installed."""

from collections.abc import KeysView, Mapping

import pytest

from dsft_api import deepspeed_config as ds
from dsft_api.problem import path_of
from dsft_api.wording import fields_at


class Recording(dict):
    """A DeepSpeed configuration that notes the top-level keys that DeepSpeed looks for."""

    def __init__(self, values: Mapping[str, object]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> object:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: object = None) -> object:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> KeysView[str]:
        return KeysView(self)

    def __copy__(self) -> "Recording":
        return self


def test_the_tables_hold_every_key_of_the_installed_deepspeed():
    from deepspeed.runtime import config as installed
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    recording = Recording({"train_batch_size": 1})
    installed.DeepSpeedConfig(recording)
    removed_zero = installed._REMOVED_ZERO_CONFIG_KEYS.keys()
    removed = installed._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys()
    # Looked for only where a process group exists.
    top_level = recording.asked - removed | {"sequence_parallel_size"}

    assert ds.known_keys() == top_level
    assert ds.known_keys("zero_optimization") == {
        info.alias or name for name, info in DeepSpeedZeroConfig.model_fields.items()
    }
    assert removed | {f"zero_optimization.{key}" for key in removed_zero} == ds.REMOVED


def test_each_key_of_deepspeed_is_in_one_table():
    tables = [set(ds.OWNED), set(ds.REMOVED), set(ds.UNSUITABLE), set(ds.FREE)]
    assert sum(map(len, tables)) == len(set.union(*tables))


@pytest.mark.parametrize("field", sorted({word for text in ds.OWNED.values() for word in text.split(" and ")}))
def test_owned_keys_point_to_real_fields(field):
    *above, last = path_of(field)
    assert last in fields_at(tuple(above))
