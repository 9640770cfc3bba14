"""The data room's errors: each is one line for a person, naming the object, the value and what to do."""

from __future__ import annotations

from itpn_core.errors import UserError


class DataError(UserError):
    """Anything about the data that a person can put right; its text is one clear line."""


class SourceError(DataError):
    """The images handed to `make_shards` cannot be read or make no data set."""


class StoreError(DataError):
    """A file, bucket or server cannot be reached, or refused us."""


class NotFoundError(StoreError):
    """The named object does not exist in a store that answers."""


class ShortReadError(StoreError):
    """A reply or a file holds other or fewer bytes than were asked for."""


class ChangedError(StoreError):
    """The object is no longer the one the manifest was made from (its ETag differs)."""


class ManifestError(DataError):
    """The manifest is missing, malformed, or does not describe the objects beside it."""


class IntegrityError(DataError):
    """Bytes of a shard, a member or an index are not the bytes that were recorded."""


class QuarantineError(DataError):
    """More samples are damaged than the configuration allows."""


class DataGoneError(DataError):
    """The data stayed away longer than `data.store.give_up_s`: this rank cannot go on."""


class StorageGoneError(UserError):
    """Storage stayed away longer than the settings allow: the run ends as failed, its last commit intact."""
