// What one degree can do: for all waves (`fixed`), and for each wave its own (`adaptive`). These are the baselines that a
// plan is compared with and the floor under it.
//
// `fixed` fills waves under a time cap from the longest sequence down, for many caps and every degree that holds the
// longest. `adaptive` takes the best degree for each of those waves, and for those of token-balanced contiguous chunks.

#pragma once

#include <cmath>

#include "pack.hpp"

namespace distrain {

struct Plan { std::vector<Wave> waves; double ms = NEVER; };

// Contiguous chunks of the sequences with about equal tokens, at most `num`.
inline std::vector<Members> chunks(const Problem& p, int num) {
  double tokens = 0;
  for (int k = 0; k < p.num_sequences; k++) tokens += p.length[k];
  auto cut = [&](double most, std::vector<Members>* found) {
    int count = 0;
    double sum = most;
    for (int k = 0; k < p.num_sequences; k++) {
      if (count == 0 || sum + p.length[k] > most) {
        count++, sum = 0;
        if (found) found->emplace_back();
      }
      if (found) found->back().push_back(k);
      sum += p.length[k];
    }
    return count;
  };
  double low = std::max(p.length[0], tokens / num), high = std::max(tokens, low);
  for (int step = 0; step < 40 && high - low > .5; step++) {
    double most = (low + high) / 2;
    if (cut(most, nullptr) <= num) high = most;
    else low = most;
  }
  std::vector<Members> found;
  cut(high, &found);
  return found;
}

class Homogeneous {
 public:
  // Tries more caps while less than `work` is done.
  Homogeneous(const Problem& problem, Packer& packer, int64_t work) : p_(problem), packer_(packer), work_(work) {
    for (int k = 0; k < p_.num_sequences; k++) tokens_ += p_.length[k];
  }

  Plan fixed() {
    Plan best;
    for (double cap : CAPS)
      for (int i = p_.least[0]; i < p_.num_degrees && (cap == CAPS[0] || packer_.work < work_); i++) {
        double area = 0, groups = p_.num_slots / p_.degree[i];
        for (int k = 0; k < p_.num_sequences; k++) area += p_.time(k, i) / groups;
        double least = std::max(1.0, std::ceil(tokens_ / (groups * p_.capacity[i])));
        if (area + least * p_.beta >= best.ms) continue;
        Plan plan = filled(i, area / least * cap, area, best.ms);
        if (plan.ms < best.ms) best = std::move(plan);
      }
    for (Wave& wave : best.waves) shorten(wave, wave.style.only);
    best.ms = total(best.waves);
    return best;
  }

  Plan adaptive(const Plan& fixed) {
    Plan best = fixed;
    for (Wave& wave : best.waves)
      for (int i = 0; i < p_.num_degrees; i++) shorten(wave, i);
    best.ms = total(best.waves);
    int least = std::max(1, int(std::ceil(tokens_ / p_.memory())));
    for (int num = least, tried = 0; tried < 3 && num <= 2 * p_.num_sequences; num += std::max(1, (num - least) / 4)) {
      Plan plan;
      for (Members& members : chunks(p_, num)) {
        Wave wave;
        wave.members = std::move(members), wave.ms = NEVER;
        for (int i = 0; i < p_.num_degrees; i++) shorten(wave, i);
        plan.waves.push_back(std::move(wave));
      }
      plan.ms = total(plan.waves);
      tried += plan.ms < NEVER;
      if (plan.ms < best.ms) best = std::move(plan);
    }
    return best;
  }

 private:
  static constexpr double CAPS[] = {1.1, 1.35, 1.6, 1.2, 2.2, 1, 1.05, 4, .8};  // of the mean duration of a wave

  double total(const std::vector<Wave>& waves) const {
    double ms = 0;
    for (const Wave& wave : waves) ms += wave.ms + p_.beta;
    return ms;
  }
  // The wave with groups of degree `i`, if that is shorter.
  void shorten(Wave& wave, int i) {
    Wave other;
    other.members = wave.members;
    if (packer_.single(other, i, wave.ms) && other.ms < wave.ms) wave = std::move(other);
  }
  // Waves of about `target` ms in groups of degree `i`, longest sequences first; none if they take `limit` or more.
  // `area` is what the sequences take if they are spread evenly.
  Plan filled(int i, double target, double area, double limit) {
    Plan plan;
    double spent = 0;
    Members pool(p_.num_sequences);
    for (int k = 0; k < p_.num_sequences; k++) pool[k] = k;
    while (!pool.empty()) {
      if (spent + area * (1 - 1e-9) >= limit) return {};
      Wave wave;
      Members rest;
      wave.cap = std::max(target, p_.time(pool[0], i)), wave.style = {1, i};
      wave.ms = packer_.pack(pool, wave.cap, wave.style, &wave.members, &rest);
      if (rest.empty()) shorten(wave, i);
      for (int k : wave.members) area -= p_.time(k, i) / (p_.num_slots / p_.degree[i]);
      spent += wave.ms + p_.beta;
      plan.waves.push_back(std::move(wave));
      pool.swap(rest);
    }
    plan.ms = total(plan.waves);
    return plan;
  }

  const Problem& p_;
  Packer& packer_;
  const int64_t work_;
  double tokens_ = 0;
};

}  // namespace distrain
