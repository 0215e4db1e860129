"""Facts about the contract that protobuf cannot state: which kind carries what, what each measure is."""

from esperml.contract.errors import InvalidFieldError
from esperml.contract.kinds import KINDS, PAYLOADS, KindValue, check_event, kind_name, parse_kind
from esperml.contract.measures import MEASURES, Measure

__all__ = [
    "KINDS",
    "MEASURES",
    "PAYLOADS",
    "InvalidFieldError",
    "KindValue",
    "Measure",
    "check_event",
    "kind_name",
    "parse_kind",
]
