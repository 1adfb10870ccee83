// Tables of R32 for fuzzing: decoder and encoder entries of frequencies.
#pragma once

#include <cstdint>
#include <vector>

#include "r32.h"

struct Tables {
    std::vector<uint32_t> decode;
    std::vector<uint64_t> encode;
    std::vector<std::vector<uint8_t>> usable;

    explicit Tables(size_t count) : decode(count * kvstore::r32::kSlots), encode(count * kvstore::r32::kSymbols), usable(count) {}

    // Symbol i of a table has the slots cuts[i] .. cuts[i + 1] - 1.
    void set(size_t table, const std::vector<uint32_t>& cuts) {
        using namespace kvstore::r32;
        for (size_t symbol = 0; symbol + 1 < cuts.size(); ++symbol) {
            const uint32_t start = cuts[symbol], frequency = cuts[symbol + 1] - start;
            if (!frequency) continue;
            usable[table].push_back(uint8_t(symbol));
            encode[table * kSymbols + symbol] = encoder_entry(frequency, start);
            for (uint32_t i = 0; i < frequency; ++i) decode[table * kSlots + start + i] = uint32_t(symbol) | (frequency - 1) << 8 | i << 20;
        }
    }

    // As in codecs/r32/tables.py.
    static uint64_t encoder_entry(uint32_t frequency, uint32_t start) {
        unsigned shift = 31 - unsigned(__builtin_clz(frequency));
        uint64_t reciprocal, extra = 0;
        if (frequency == 1) {
            reciprocal = 0xFFFFFFFF, extra = 1;
        } else if ((frequency & (frequency - 1)) == 0) {
            reciprocal = uint64_t{1} << 31, --shift;
        } else {
            const uint64_t power = uint64_t{1} << (32 + shift);
            reciprocal = (power + frequency - 1) / frequency;
            if (reciprocal * frequency - power > 2048) --reciprocal, extra = 1;
        }
        return reciprocal | uint64_t{(frequency - 1) | shift << 12 | uint32_t(extra) << 16 | start << 20} << 32;
    }
};
