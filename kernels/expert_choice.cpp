// A layer's choice of experts under a budget, in one call; `expert_choice.py` says what for, and router/ what it means:
// every step here is one of its functions, and gives the same result to the bit.
//
// Shapes: T rows, E experts, K experts per row, G groups, R ranks. Compile without contraction: a product that is added
// unrounded would break ties otherwise than the reference does.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

enum Score : int32_t { PROBABILITIES, SELECTED, SQUARED, SURVIVAL };
enum List : int32_t { ALL, COVERING, MOST_IMPORTANT, MOST_IMPORTANT_OF_OWNERS };

struct Budget {
    Score score;
    List list;
    float coverage;
    int32_t substitutes, limits_ranks;
    float min_rank_share;
    float beyond_part;  // share of its worth that an expert beyond its rank's part keeps
    int64_t experts;
    int64_t max_ranks;  // other ranks that a row may visit
};

struct Rows {
    int64_t num_rows, num_groups;
    const uint8_t *budgeted, *valid;  // [T]; valid is null where there are no padding rows
    const int64_t *groups;            // [T]
    const float *reach;               // [T]
};

struct Routing {
    int64_t num_experts, top_k;
    int32_t in_groups;
    const float *scores, *affinities;  // [T, E]
    const float *values;               // [T, K], read by budgets that substitute
    const int64_t *ids;                // [T, K]
};

struct Ranks {
    int64_t num_ranks, home;
    const int64_t *owner;  // [E]
};

// What comes first: the larger, NaN before all, of equals the lower id
struct Better {
    const float *numbers;
    bool operator()(int64_t a, int64_t b) const {
        const float x = numbers[a], y = numbers[b];
        if (x > y) return true;
        if (x < y) return false;
        const bool x_is_nan = std::isnan(x), y_is_nan = std::isnan(y);
        return x_is_nan != y_is_nan ? x_is_nan : a < b;
    }
};

// The places of the `wanted` best of `size` numbers, best first
void best_first(const float *numbers, int64_t size, int64_t wanted, std::vector<int64_t> &order) {
    order.resize(size);
    for (int64_t i = 0; i < size; i++) order[i] = i;
    std::partial_sort(order.begin(), order.begin() + wanted, order.end(), Better{numbers});
}

float at_least_tiny(double sum) {
    const float rounded = float(sum);
    return rounded < FLT_MIN ? FLT_MIN : rounded;
}

// numbers [size] as shares of their sum
void to_shares(float *numbers, int64_t size) {
    double sum = 0;
    for (int64_t i = 0; i < size; i++) sum += numbers[i];
    const float total = at_least_tiny(sum);
    for (int64_t i = 0; i < size; i++) numbers[i] /= total;
}

// Worth of experts to the budgeted rows of their groups, and what other rows load anyway: both [G, E]
void add_worth(const Budget &budget, const Rows &rows, const Routing &routing, float *worth, float *loaded) {
    const int64_t num_experts = routing.num_experts, top_k = routing.top_k;
    std::fill_n(worth, rows.num_groups * num_experts, 0.0f);
    std::fill_n(loaded, rows.num_groups * num_experts, 0.0f);
    std::vector<float> shares(std::max(num_experts, top_k));
    for (int64_t t = 0; t < rows.num_rows; t++) {
        const float *affinities = routing.affinities + t * num_experts;
        const int64_t *ids = routing.ids + t * top_k;
        float *of_group = worth + rows.groups[t] * num_experts;
        if (!rows.budgeted[t]) {
            const bool is_padding = rows.valid && !rows.valid[t];
            for (int64_t k = 0; !is_padding && k < top_k; k++) loaded[rows.groups[t] * num_experts + ids[k]] = 1.0f;
            continue;
        }
        if (budget.score == PROBABILITIES) {
            std::copy_n(affinities, num_experts, shares.data());
            to_shares(shares.data(), num_experts);
            for (int64_t e = 0; e < num_experts; e++) of_group[e] += shares[e];
            continue;
        }
        for (int64_t k = 0; k < top_k; k++) shares[k] = affinities[ids[k]];
        to_shares(shares.data(), top_k);
        for (int64_t k = 0; k < top_k; k++) {
            float share = shares[k];
            if (budget.score != SELECTED) share *= share;
            if (budget.score == SURVIVAL) share *= rows.reach[t];
            of_group[ids[k]] += share;
        }
    }
}

void most_important(const float *worth, int64_t num_experts, int64_t wanted, uint8_t *kept) {
    std::vector<int64_t> order;
    best_first(worth, num_experts, wanted, order);
    for (int64_t i = 0; i < wanted; i++) kept[order[i]] = 1;
}

// is_part [E]: whether an expert is among the best of its rank that make up the rank's part of those wanted
void parts_of_ranks(const float *worth, int64_t num_experts, int64_t wanted, const Ranks &ranks, uint8_t *is_part) {
    std::vector<int64_t> order, left(ranks.num_ranks);
    for (int64_t e = 0; e < num_experts; e++) left[ranks.owner[e]] += wanted;
    for (int64_t &number : left) number = (number + num_experts - 1) / num_experts;
    best_first(worth, num_experts, num_experts, order);
    for (int64_t e : order) is_part[e] = left[ranks.owner[e]]-- > 0;
}

void most_important_of_owners(const float *worth, int64_t num_experts, int64_t wanted, const Ranks &ranks,
                              uint8_t *kept) {
    std::vector<uint8_t> is_part(num_experts);
    parts_of_ranks(worth, num_experts, wanted, ranks, is_part.data());
    for (int64_t e = 0; e < num_experts; e++) kept[e] |= is_part[e];
}

void most_important_evenly(const float *worth, int64_t num_experts, int64_t wanted, float beyond_part,
                           const Ranks &ranks, uint8_t *kept) {
    std::vector<uint8_t> is_part(num_experts);
    std::vector<float> discounted(worth, worth + num_experts);
    parts_of_ranks(worth, num_experts, wanted, ranks, is_part.data());
    for (int64_t e = 0; e < num_experts; e++)
        if (!is_part[e]) discounted[e] *= beyond_part;
    most_important(discounted.data(), num_experts, wanted, kept);
}

void covering(const float *worth, const float *loaded, int64_t num_experts, float coverage, int64_t min_experts,
              uint8_t *kept) {
    std::vector<int64_t> order;
    std::vector<float> keys(num_experts), reached(num_experts);
    for (int64_t e = 0; e < num_experts; e++) keys[e] = loaded[e] > 0 ? INFINITY : worth[e];
    best_first(keys.data(), num_experts, num_experts, order);
    double sum = 0;
    for (int64_t i = 0; i < num_experts; i++) reached[i] = float(sum += worth[order[i]]);
    const float wanted = coverage * reached[num_experts - 1];
    for (int64_t i = 0; i < num_experts; i++)
        if (i < min_experts || reached[i] - worth[order[i]] < wanted) kept[order[i]] = 1;
}

// kept [G, E]: the experts on each group's list, or loaded anyway
void shortlists(const Budget &budget, const Rows &rows, const Routing &routing, const Ranks &ranks, const float *worth,
                const float *loaded, uint8_t *kept) {
    const int64_t num_experts = routing.num_experts;
    for (int64_t g = 0; g < rows.num_groups; g++, worth += num_experts, loaded += num_experts, kept += num_experts) {
        for (int64_t e = 0; e < num_experts; e++) kept[e] = loaded[e] > 0;
        if (budget.list == COVERING)
            covering(worth, loaded, num_experts, budget.coverage, std::min(routing.top_k, num_experts), kept);
        else if (budget.list == MOST_IMPORTANT_OF_OWNERS)
            most_important_of_owners(worth, num_experts, budget.experts, ranks, kept);
        else if (budget.beyond_part != 1)
            most_important_evenly(worth, num_experts, std::min(budget.experts, num_experts), budget.beyond_part, ranks, kept);
        else
            most_important(worth, num_experts, std::min(budget.experts, num_experts), kept);
    }
}

// The best allowed experts of row t, as `substitute` chooses them; values may be null
void substitute(const Routing &routing, int64_t t, const uint8_t *allowed, int64_t *ids, float *values) {
    const int64_t num_experts = routing.num_experts, top_k = routing.top_k;
    const int64_t *own = routing.ids + t * top_k;
    bool keeps_own = true;
    for (int64_t k = 0; k < top_k; k++) keeps_own &= allowed[own[k]];
    if (keeps_own) {
        std::copy_n(own, top_k, ids);
        if (values) std::copy_n(routing.values + t * top_k, top_k, values);
        return;
    }
    const float *scores = routing.scores + t * num_experts, *affinities = routing.affinities + t * num_experts;
    const auto is_outside = [&](int64_t e) {
        return routing.in_groups && (scores[e] == -INFINITY || (scores[e] == 0 && affinities[e] > 0));
    };
    float lowest = INFINITY;
    for (int64_t e = 0; routing.in_groups && e < num_experts; e++) {
        if (is_outside(e)) continue;
        if (scores[e] < lowest || std::isnan(scores[e])) lowest = scores[e];
        if (std::isnan(lowest)) break;
    }
    std::vector<float> keys(num_experts);
    for (int64_t e = 0; e < num_experts; e++)
        keys[e] = !allowed[e] ? -INFINITY : is_outside(e) ? lowest - 2.0f + affinities[e] : scores[e];
    std::vector<int64_t> order;
    best_first(keys.data(), num_experts, top_k, order);
    for (int64_t k = 0; k < top_k; k++) {
        ids[k] = order[k];
        if (values) values[k] = is_outside(order[k]) ? affinities[order[k]] : scores[order[k]];
    }
}

// Withdraws from allowed [E] what row t may not visit
void stay_on_visited_ranks(const Budget &budget, const Routing &routing, int64_t t, const Ranks &ranks,
                           uint8_t *allowed) {
    const int64_t num_experts = routing.num_experts, top_k = routing.top_k, num_ranks = ranks.num_ranks;
    std::vector<int64_t> ids(routing.ids + t * top_k, routing.ids + (t + 1) * top_k), nearest;
    if (budget.substitutes) substitute(routing, t, allowed, ids.data(), nullptr);
    std::vector<float> shares(top_k), weight(num_ranks);
    for (int64_t k = 0; k < top_k; k++) shares[k] = routing.affinities[t * num_experts + ids[k]] * allowed[ids[k]];
    to_shares(shares.data(), top_k);
    for (int64_t k = 0; k < top_k; k++) weight[ranks.owner[ids[k]]] += shares[k];
    std::vector<float> others = weight;
    others[ranks.home] = -1.0f;
    const int64_t most = std::min(budget.max_ranks, num_ranks - 1);
    best_first(others.data(), num_ranks, most, nearest);
    std::vector<uint8_t> visits(num_ranks);
    for (int64_t i = 0; i < most; i++) {
        const float there = weight[nearest[i]];
        visits[nearest[i]] = (there >= budget.min_rank_share && there > 0) || (i == 0 && there > weight[ranks.home]);
    }
    visits[ranks.home] = 1;
    for (int64_t e = 0; e < num_experts; e++) allowed[e] &= visits[ranks.owner[e]];
}

}  // namespace

extern "C" {

// both [2, G, E]: what experts are worth, and whether they are loaded anyway (1 or 0)
void expert_worth(const Budget *budget, const Rows *rows, int64_t num_experts, int64_t top_k, const float *affinities,
                  const int64_t *ids, float *both) {
    const Routing routing{num_experts, top_k, false, nullptr, affinities, nullptr, ids};
    add_worth(*budget, *rows, routing, both, both + rows->num_groups * num_experts);
}

// both [2, G, E]: as `expert_worth` gives it, summed over ranks; null: this rank's own. Gives allowed [T, E], kept [T]
// and, if the budget substitutes, the choice [T, K]
void choose_experts(const Budget *budget, const Rows *rows, const Ranks *ranks, const float *both, int64_t num_experts,
                    int64_t top_k, int32_t in_groups, const float *scores, const float *affinities, const float *values,
                    const int64_t *ids, uint8_t *allowed, float *kept, float *chosen_values, int64_t *chosen_ids) {
    const Routing routing{num_experts, top_k, in_groups, scores, affinities, values, ids};
    const int64_t list_size = rows->num_groups * num_experts;
    std::vector<uint8_t> lists;
    if (budget->list != ALL) {
        std::vector<float> own;
        if (!both) {
            own.resize(2 * list_size);
            add_worth(*budget, *rows, routing, own.data(), own.data() + list_size);
            both = own.data();
        }
        lists.resize(list_size);
        shortlists(*budget, *rows, routing, *ranks, both, both + list_size, lists.data());
    }
    std::vector<float> shares(top_k);
    for (int64_t t = 0; t < rows->num_rows; t++, allowed += num_experts) {
        if (!rows->budgeted[t] || lists.empty())
            std::memset(allowed, 1, num_experts);
        else
            std::copy_n(&lists[rows->groups[t] * num_experts], num_experts, allowed);
        if (rows->budgeted[t] && budget->limits_ranks && ranks->num_ranks > 1)
            stay_on_visited_ranks(*budget, routing, t, *ranks, allowed);
        const int64_t *own = ids + t * top_k;
        for (int64_t k = 0; k < top_k; k++) shares[k] = affinities[t * num_experts + own[k]];
        to_shares(shares.data(), top_k);
        double sum = 0;
        for (int64_t k = 0; k < top_k; k++) sum += shares[k] * allowed[own[k]];
        kept[t] = float(sum);
        if (budget->substitutes) substitute(routing, t, allowed, chosen_ids + t * top_k, chosen_values + t * top_k);
    }
}
}
