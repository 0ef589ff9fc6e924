import pytest

from trtkit.plan import cost
from trtkit.plan.prices import GpuPrice, load_prices
from trtkit.spec.errors import InputError, UsageError
from trtkit.spec.measured import Measured, Source


def rate(value, low=None, high=None, source=Source.MEASURED):
    return Measured(value=value, unit="tok/s", source=source, low=low, high=high)


def machine(usd_h=2.2, gpus=2):
    price = GpuPrice(gpu="x", kind="cloud", name="n", usd_per_gpu_h=usd_h, source="list", date="2025-01")
    return cost.rented(price, gpus)


@pytest.mark.parametrize(
    ("tok_s", "usd", "gpus", "expected"),
    # The corrected values of the published comparison, worked out by hand.
    [(680, 2.20, 2, 1.797), (1560, 3.50, 1, 0.623), (1150, 3.50, 1, 0.845)],
)
def test_the_published_configurations_at_their_own_prices(tok_s, usd, gpus, expected):
    assert cost.cost_per_million(tok_s, usd, gpus) == pytest.approx(expected, abs=0.0006)


def test_half_busy_costs_twice():
    assert cost.cost_per_million(100, 1.0, utilisation=0.5) == 2 * cost.cost_per_million(100, 1.0)


@pytest.mark.parametrize("bad", [(0, 1, 1), (-5, 1, 1), (5, 0, 1), (5, 1, 0)])
def test_nonsense_is_refused(bad):
    with pytest.raises(UsageError, match="above 0"):
        cost.cost_per_million(*bad)


@pytest.mark.parametrize("utilisation", [0, -0.1, 1.01])
def test_a_utilisation_outside_its_range_is_refused(utilisation):
    with pytest.raises(UsageError, match="utilisation"):
        cost.cost_per_million(5, 1, utilisation=utilisation)


def test_the_interval_of_the_throughput_turns_over():
    priced = cost.cost_of(rate(100, low=80, high=125), 3.6)
    assert (priced.low, priced.value, priced.high) == pytest.approx((8.0, 10.0, 12.5))


def test_an_assumed_price_makes_the_cost_assumed():
    price = GpuPrice(gpu="x", kind="cloud", name="n", usd_per_gpu_h=1, source="assumed: a guess", date="2025-01")
    line = cost.estimate(cost.rented(price, 1), cost.Load(output_tok_s=rate(10)))[0]
    assert line.cost.source is Source.ASSUMED
    assert cost.estimate(machine(), cost.Load(output_tok_s=rate(10)))[0].cost.source is Source.MEASURED


def test_every_definition_is_named_and_none_is_invented():
    plain = cost.estimate(machine(), cost.Load(output_tok_s=rate(100)))
    assert [(line.definition, line.tokens) for line in plain] == [("full load", "output")]
    load = cost.Load(output_tok_s=rate(100), input_tok_s=rate(400), at_slo_tok_s=rate(50))
    lines = cost.estimate(machine(), load, utilisation=0.5, tokens_per_month=30e6)
    by_name = {(line.definition, line.tokens): line.cost.value for line in lines}
    full = by_name["full load", "output"]
    assert by_name["full load", "input"] == pytest.approx(full / 4)
    assert by_name["full load", "input+output"] == pytest.approx(full / 5)
    assert by_name["blended (input / 4)", "output-equivalent"] == pytest.approx(full / 2)
    assert by_name["measured utilisation", "output"] == pytest.approx(2 * full)
    assert by_name["at SLO", "output"] == pytest.approx(2 * full)
    assert by_name["bought month", "output"] == pytest.approx(2 * 2.2 * 730 / 30)


def test_a_bought_month_of_two_h100_for_30m_tokens():
    # 5,110 USD for 30M tokens: 170.33 per million, whatever the throughput.
    line = cost.estimate(machine(3.5), cost.Load(output_tok_s=rate(1560)), tokens_per_month=30e6)[-1]
    assert line.cost.value == pytest.approx(170.33, abs=0.01)
    assert "5,110 USD" in line.arithmetic


def test_more_tokens_than_the_machine_can_make_are_refused():
    with pytest.raises(UsageError, match="machines at"):
        cost.estimate(machine(), cost.Load(output_tok_s=rate(1)), tokens_per_month=1e9)


def test_an_owned_machine_adds_purchase_power_and_upkeep():
    onprem = load_prices().onprem
    own = cost.owned("h100-sxm", 2, onprem, tdp_w=700)
    by_hand = 2 * (30000 / 36 + 0.7 * 1.3 * 0.12 * 730 + 500)
    assert own.usd_per_month == pytest.approx(by_hand)
    assert own.source is Source.ASSUMED


def test_break_even_says_when_an_api_is_always_cheaper():
    apis = [("dear", 10.0), ("cheap", 0.001)]
    dear, cheap = cost.break_even(machine(), rate(680), apis)
    assert dear.million_tokens_month == pytest.approx(2 * 2.2 * 730 / 10)
    assert cheap.million_tokens_month is None
    assert "never" in cheap.arithmetic


def test_every_built_in_price_has_a_source_and_a_date():
    book = load_prices()
    for entry in (*book.gpu, *book.api, book.onprem):
        assert entry.source
        assert entry.date


def test_a_users_prices_come_first_and_the_rest_stays(tmp_path):
    file = tmp_path / "p.toml"
    file.write_text(
        '[[gpu]]\ngpu="h100-sxm"\nkind="cloud"\nname="mine"\nusd_per_gpu_h=1.5\nsource="bill"\ndate="2026-01"\n'
        "[onprem]\nusd_per_kwh=0.3\n"
    )
    book = load_prices(file)
    assert book.gpu_price("h100-sxm").usd_per_gpu_h == 1.5
    assert book.gpu_price("a100-80gb-sxm").usd_per_gpu_h == 2.2
    assert (book.onprem.usd_per_kwh, book.onprem.capex_usd) == (0.3, 30000)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[[gpu]\n", "TOML"),
        ("[gpus]\nx=1\n", "unknown section"),
        ('[[gpu]]\ngpu="x"\n', "missing"),
        ('[[gpu]]\ngpu="x"\nkind="cloud"\nname="m"\nusd_per_gpu_h=-1\nsource="s"\ndate="d"\n', "above 0"),
        ("gpu = 3\n", "lists of tables"),
        ("[onprem]\namortise_months=0\n", "at least 1"),
    ],
)
def test_a_damaged_price_file_is_one_sentence(tmp_path, text, word):
    file = tmp_path / "p.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=word):
        load_prices(file)


def test_a_missing_price_says_what_to_give():
    with pytest.raises(UsageError, match="--usd-per-gpu-h"):
        load_prices().gpu_price("abacus")
