"""The policies that a server holds, by name, and which of them decides where nothing else is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from esperml.contract import InvalidFieldError
from esperml.settings import TamiyoSettings
from esperml.tamiyo import checkpoint
from esperml.tamiyo.checkpoint import CheckpointError
from esperml.tamiyo.policies import CHANCE_PROBABILITY, EXPLORE_PROBABILITY, ChancePolicy, GcnPolicy, Policy

SHIPPED: Final = "shipped"
SHIPPED_PATH: Final = Path(__file__).parent / "checkpoints" / "shipped"


class UnknownPolicyError(LookupError):
    """There is no policy of that name.

    Attributes:
        name: the name that was asked for.
        field: the field of a request that asked for it; empty where none did.
    """

    def __init__(self, name: str, known: list[str], field: str = "") -> None:
        problem = f"there is no policy named {name!r}; there are {', '.join(known)}"
        super().__init__(f"{field}: {problem}" if field else problem)
        self.name = name
        self.field = field


class NoPromotionError(LookupError):
    """There is no promotion to roll back."""

    def __init__(self) -> None:
        super().__init__("no policy was promoted since the server started; there is nothing to roll back")


class PolicyStore:
    """Named policies, and the default among them.

    ``chance``, ``explore`` and ``nothing`` are always there; ``shipped`` is loaded when it is first asked for.

    Args:
        policy_dir: folder from which checkpoints may be promoted.
        default: name of a policy that is there, or path of a checkpoint, which is then loaded under the name of its
            folder.

    Raises:
        CheckpointError: ``default`` is a checkpoint that cannot be used.
    """

    def __init__(self, policy_dir: Path, default: str = SHIPPED) -> None:
        self._dir = policy_dir
        self._policies: dict[str, Policy] = {}
        for name, probability in (("chance", CHANCE_PROBABILITY), ("explore", EXPLORE_PROBABILITY), ("nothing", 0.0)):
            self.add(ChancePolicy(name, probability))
        self._defaults: list[Policy] = []
        if default == SHIPPED or default in self._policies:
            self._defaults.append(self.get(default))
        else:
            path = Path(default)
            self._defaults.append(self.load(path.resolve().name, path))

    @classmethod
    def from_settings(cls, settings: TamiyoSettings) -> PolicyStore:
        """The store that the settings ask for. Raises :class:`CheckpointError` as the constructor does."""
        return cls(settings.policy_dir, settings.policy)

    @property
    def default(self) -> Policy:
        """The policy that decides where nothing else is asked for."""
        return self._defaults[-1]

    @property
    def policies(self) -> list[Policy]:
        """All policies, by name."""
        return [self._policies[name] for name in sorted(self._policies)]

    def get(self, name: str, field: str = "") -> Policy:
        """The policy of a name, the default for the empty one.

        Args:
            name: of the policy.
            field: the field of a request that holds the name, for the error to name.

        Raises:
            UnknownPolicyError: there is none.
            CheckpointError: it is the shipped one, and its checkpoint is missing or damaged.
        """
        if not name:
            return self.default
        if name == SHIPPED and SHIPPED not in self._policies:
            if not SHIPPED_PATH.exists():
                raise CheckpointError(
                    SHIPPED_PATH, "is not there: this build ships no trained policy; name another, such as chance"
                )
            return self.load(SHIPPED, SHIPPED_PATH)
        if name not in self._policies:
            raise UnknownPolicyError(name, sorted(self._policies), field)
        return self._policies[name]

    def add(self, policy: Policy) -> None:
        """Hold a policy under its name, in the place of one that had it."""
        self._policies[policy.facts.name] = policy

    def load(self, name: str, path: Path) -> Policy:
        """Load a checkpoint from anywhere and hold it under ``name``. Raises :class:`CheckpointError`."""
        policy = GcnPolicy.of(name, checkpoint.load(path))
        self.add(policy)
        return policy

    def promote(self, name: str, relative_path: str) -> Policy:
        """Load a checkpoint from the policy folder and make it the default.

        Args:
            name: to hold it under; not one of the plain policies'.
            relative_path: of its folder, relative to the policy folder.

        Raises:
            InvalidFieldError: the name is empty or a plain policy's, or the path is none or leads out of the policy
                folder.
            CheckpointError: the checkpoint cannot be used.
        """
        if not name or isinstance(self._policies.get(name), ChancePolicy):
            raise InvalidFieldError("name", f"{name!r} cannot name a promoted policy")
        if "\0" in relative_path:
            raise InvalidFieldError("checkpoint", f"{relative_path!r} cannot name a folder")
        folder = self._dir.resolve()
        path = (folder / relative_path).resolve()
        if not path.is_relative_to(folder):
            raise InvalidFieldError("checkpoint", f"{relative_path!r} leads out of the policy folder")
        policy = self.load(name, path)
        self._defaults.append(policy)
        return policy

    def roll_back(self) -> Policy:
        """Make the default what it was before the last promotion, and return it.

        Raises:
            NoPromotionError: nothing was promoted.
        """
        if len(self._defaults) == 1:
            raise NoPromotionError
        self._defaults.pop()
        self.add(self.default)
        return self.default
