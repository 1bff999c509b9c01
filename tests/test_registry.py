from functools import partial

import pytest
import torch

from lit_rlhf import registry
from lit_rlhf.errors import InputError
from lit_rlhf.functional import aggregate, generalized_advantage_estimation, group_normalize, leave_one_out
from lit_rlhf.registry import (
    call_with_named,
    get_adv_estimator,
    get_policy_loss,
    has_ratio,
    register_adv_estimator,
    register_policy_loss,
)

NAN = float("nan")
MASK = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [1, 0, 0]], dtype=torch.bool)
SCORES = torch.tensor([1.0, 0.0, 4.0, 2.0])
PER_TOKEN = torch.tensor([[0.25, 0.75, NAN], [-2.0, NAN, 2.0], [1.0, 1.0, 2.0], [2.0, NAN, NAN]])  # the same scores
IDS = torch.tensor([9, 4, 9, 4])


@pytest.fixture(autouse=True)
def _own_tables(monkeypatch):
    monkeypatch.setattr(registry.names, "_ADV_ESTIMATORS", dict(registry.names._ADV_ESTIMATORS))
    monkeypatch.setattr(registry.names, "_POLICY_LOSSES", dict(registry.names._POLICY_LOSSES))


def spread(per_row):
    return torch.where(MASK, torch.as_tensor(per_row)[:, None], torch.zeros(()))


@pytest.mark.parametrize("rewards", [SCORES, PER_TOKEN], ids=["scores", "per_token"])
class TestEstimators:
    @pytest.mark.parametrize("scale", ["std", "none", "batch"])
    def test_group_normalize(self, rewards, scale):
        advantages, returns = get_adv_estimator("group_normalize")(rewards, MASK, group_ids=IDS, scale_rewards=scale)
        torch.testing.assert_close(advantages, spread(group_normalize(SCORES, IDS, scale)))
        torch.testing.assert_close(returns, spread(SCORES))

    def test_group_normalize_by_hand(self, rewards):
        advantages, _ = get_adv_estimator("group_normalize")(rewards, MASK, group_ids=IDS)
        std = torch.tensor([4.5, 2.0]).sqrt()
        expected = [-1.5 / (std[0] + 1e-4), -1 / (std[1] + 1e-4), 1.5 / (std[0] + 1e-4), 1 / (std[1] + 1e-4)]
        torch.testing.assert_close(advantages, spread([x.item() for x in expected]))

    def test_rloo(self, rewards):
        advantages, returns = get_adv_estimator("rloo")(rewards, MASK, group_ids=IDS)
        torch.testing.assert_close(advantages, spread([-3.0, -2.0, 3.0, 2.0]))
        torch.testing.assert_close(returns, spread(SCORES))

    def test_an_unscored_row_is_left_out(self, rewards):
        holed = rewards.clone()
        holed.view(4, -1)[2, 0] = NAN
        for name in ("group_normalize", "rloo"):
            advantages, returns = get_adv_estimator(name)(holed, MASK, group_ids=torch.zeros(4))
            assert (advantages[2] == 0).all()
            assert (returns[2] == 0).all()
            rest = leave_one_out(SCORES[[0, 1, 3]], torch.zeros(3))
            if name == "rloo":
                torch.testing.assert_close(advantages[[0, 1, 3]], spread([*rest[:2], 0, rest[2]])[[0, 1, 3]])
        values = torch.rand(4, 3)
        advantages, returns = get_adv_estimator("gae")(holed, MASK, values=values)
        assert (advantages[2] == 0).all()
        torch.testing.assert_close(returns[2], values[2])
        whole, _ = get_adv_estimator("gae")(rewards, MASK, values=values)
        torch.testing.assert_close(advantages[[0, 1, 3]], whole[[0, 1, 3]])
        returns, again = get_adv_estimator("rewards_to_go")(holed, MASK)
        assert torch.isfinite(returns).all()
        assert (returns[2] == 0).all()
        assert returns is again


def test_scores_land_on_the_last_valid_token_for_token_estimators():
    values, bootstrap = torch.rand(4, 3), torch.rand(4)
    placed = torch.tensor([[0, 1.0, 0], [0, 0, 0], [0, 0, 4.0], [2.0, 0, 0]])
    got = get_adv_estimator("gae")(SCORES, MASK, values=values, gamma=0.9, gae_lambda=0.8, bootstrap=bootstrap)
    expected = generalized_advantage_estimation(placed, values, MASK, 0.9, 0.8, bootstrap)
    torch.testing.assert_close(got, expected)
    returns, _ = get_adv_estimator("rewards_to_go")(SCORES, MASK, gamma=0.5)
    assert returns.tolist() == [[0.5, 1, 0], [0, 0, 0], [1, 2, 4], [2, 0, 0]]
    per_token, _ = get_adv_estimator("rewards_to_go")(PER_TOKEN, MASK)
    assert per_token.tolist() == [[1, 0.75, 0], [0, 0, 2], [4, 3, 2], [2, 0, 0]]


class TestLosses:
    def batch(self):
        """Log-ratios by hand, one row with a hole and a pad of NaN, one empty."""
        mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
        logp = torch.full((2, 5), NAN)
        logp[0, [0, 2, 3]] = torch.tensor([-1.0, -2.0, -3.0])
        old, advantages = logp.clone(), logp.clone()
        old[0, [0, 2, 3]] -= torch.tensor([0.5, 1.5, 1.0]).log()
        advantages[0, [0, 2, 3]] = torch.tensor([-1.0, 1.0, 1.0])
        return old, logp.requires_grad_(), advantages, mask

    def check(self, name, per_token, gradient, stats, **kwargs):
        old, logp, advantages, mask = self.batch()
        loss, metrics = get_policy_loss(name)(old, logp, advantages, mask, **kwargs)
        assert loss[0, mask[0]].tolist() == pytest.approx(per_token, abs=1e-6)
        aggregate(loss, mask).backward()
        assert (3 * logp.grad[0, mask[0]]).tolist() == pytest.approx(gradient, abs=1e-5)
        assert (logp.grad[~mask] == 0).all()
        assert torch.isfinite(loss).all()
        names = ("clip_fraction", "clip_fraction_low", "clip_fraction_high", "ratio_out_of_range")
        assert set(metrics) == set(names)
        for key, expected in zip(names, stats, strict=True):
            assert metrics[key].shape == (2, 5)
            assert not metrics[key].requires_grad
            assert metrics[key][0, mask[0]].tolist() == expected
            assert (metrics[key][~mask] == 0).all()

    def test_clip(self):
        stats = ([1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0])
        self.check("clip", [0.8, -1.2, -1.0], [0, 0, -1], stats)
        stats = ([1, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0])
        self.check("clip", [0.7, -1.5, -1.0], [0, -1.5, -1], stats, clip_ratio_low=0.3, clip_ratio_high=0.6)
        logp = torch.tensor([[4.0]]).log()
        one = torch.ones(1, 1)
        assert get_policy_loss("clip")(0 * one, logp, -one, one.bool(), dual_clip=3.0)[0].item() == pytest.approx(3)

    def test_gspo(self):
        s = (0.5 * 1.5) ** (1 / 3)  # .9086
        low, wide = ([1, 0, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]), ([0] * 3,) * 4
        self.check("gspo", [0.9997, -s, -s], [-2 * s / 3] * 3, low)
        self.check("gspo", [s, -s, -s], [-s / 3] * 3, wide, clip_ratio_low=0.2, clip_ratio_high=0.2)

    def test_cispo(self):
        stats = ([0, 1, 0], [0, 0, 0], [0, 1, 0], [0, 1, 0])
        self.check("cispo", [-0.5, 1.2 * 2, 3.0], [0.5, -1.2, -1.0], stats, clip_max=1.2)
        stats = ([1, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0])
        self.check("cispo", [-0.9, 3.0, 3.0], [0.9, -1.5, -1.0], stats, clip_min=0.9)


class TestTables:
    def test_the_seeds_example_runs_as_printed(self):
        @register_adv_estimator("my_advantage")
        def compute_my_advantage(rewards, mask, **kwargs):
            advantages = rewards - rewards.mean()
            returns = rewards
            return advantages, returns

        @register_policy_loss("my_loss")
        def compute_my_loss(old_logp, logp, advantages, mask, **kwargs):
            ratio = torch.exp(logp - old_logp)
            loss = -(ratio * advantages * mask).sum() / mask.sum()
            metrics = {"loss": loss.item()}
            return loss, metrics

        everything = {"group_ids": IDS, "values": None, "gamma": 1.0, "clip_ratio_low": 0.2}
        advantages, _ = call_with_named(get_adv_estimator("my_advantage"), SCORES, MASK, **everything)
        assert advantages.tolist() == [-0.75, -1.75, 2.25, 0.25]
        logp = torch.zeros(4, 3)
        loss, metrics = call_with_named(get_policy_loss("my_loss"), logp, logp, advantages[:, None], MASK, **everything)
        assert loss.item() == metrics["loss"] == pytest.approx(-(-1.5 - 3.5 + 6.75 + 0.25) / 8)

    @pytest.mark.parametrize(("register", "taken"), [(register_adv_estimator, "gae"), (register_policy_loss, "clip")])
    def test_a_name_given_twice_raises(self, register, taken):
        before = get_adv_estimator("gae"), get_policy_loss("clip")
        with pytest.raises(InputError, match=f"'{taken}' is already registered"):
            register(taken)(lambda *args: args)
        assert before == (get_adv_estimator("gae"), get_policy_loss("clip"))

    def test_the_two_tables_do_not_share_names(self):
        register_policy_loss("gae")(len)
        assert get_policy_loss("gae") is len
        assert get_adv_estimator("gae") is not len

    def test_an_unknown_name_is_answered_with_the_nearest(self):
        with pytest.raises(InputError, match=r"'gropu_normalise': did you mean 'group_normalize'\?") as error:
            get_adv_estimator("gropu_normalise")
        registered = str(error.value).split("registered: ")[1].split(", ")
        assert registered == sorted(registered)
        assert {"gae", "group_normalize", "rewards_to_go", "rloo"} <= set(registered)
        with pytest.raises(InputError, match=r"'clp': did you mean 'clip'\?.*cispo, clip, gspo"):
            get_policy_loss("clp")

    def test_an_import_path_is_followed_and_its_nearest_name_offered(self):
        assert get_policy_loss("lit_rlhf.registry.losses._clip") is get_policy_loss("clip")
        with pytest.raises(
            InputError, match=r"module 'lit_rlhf.functional' has no 'agregate': .*functional.aggregate\?$"
        ):
            get_policy_loss("lit_rlhf.functional.agregate")
        with pytest.raises(InputError, match=r"policy loss: cannot import 'nowhere\.loss'"):
            get_policy_loss("nowhere.loss")

    def test_a_class_and_a_number_are_no_functions(self):
        with pytest.raises(
            InputError, match=r"estimator: torch\.nn\.modules\.linear\.Linear is a class; .*_estimator\._target_="
        ):
            get_adv_estimator(torch.nn.Linear)
        with pytest.raises(InputError, match="policy loss: 3 is no function; give a registered name"):
            get_policy_loss(3)

    def test_a_partial_is_known_for_its_function(self):
        assert not has_ratio(partial(get_policy_loss("reinforce")))
        assert has_ratio(partial(get_policy_loss("clip"), clip_ratio_low=0.1))

    def test_a_callable_is_its_own_name(self):
        assert get_adv_estimator(max) is max
        assert get_policy_loss(max) is max


class TestCallWithNamed:
    def test_only_what_the_signature_names(self):
        def fn(a, b, *, c, d=4):
            return a, b, c, d

        assert call_with_named(fn, 1, 2, c=3, e=5) == (1, 2, 3, 4)
        assert call_with_named(fn, 1, b=2, c=3, d=0) == (1, 2, 3, 0)

    def test_everything_for_a_function_that_takes_everything(self):
        def fn(rewards, mask, **kw):
            return rewards, mask, kw

        assert call_with_named(fn, 1, 2, mask=7, gamma=3) == (1, 2, {"gamma": 3})

    def test_objects_are_called_too(self):
        class Scale:
            def __call__(self, x, gamma=2.0):
                return x * gamma

        assert call_with_named(Scale(), 3, beta=1) == 6
        assert call_with_named(Scale(), 3, gamma=3) == 9

    def test_what_a_partial_has_fixed_stays(self):
        def fn(x, gamma=1.0, beta=2.0):
            return x, gamma, beta

        assert call_with_named(partial(fn, gamma=0.5), 3, gamma=0.9, beta=0.1) == (3, 0.5, 0.1)

    def test_a_missing_keyword_is_named(self):
        for given in ({}, {"values": None}):
            with pytest.raises(InputError, match="_gae needs 'values'"):
                call_with_named(get_adv_estimator("gae"), SCORES, MASK, gamma=1.0, **given)
