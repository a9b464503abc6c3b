/* XXH3 of 128 bits (Yann Collet, BSD-2-Clause: xxhash.com, doc/xxhash_spec.md), of more than 240 bytes and without a
   seed; the digest as the package `xxhash` gives it. Its lanes are written here for AVX2 as well, which x86 without a
   flag at compile time does not use: a slice of CT takes 9 µs instead of 24. */

#include <string.h>

#include "native.h"

enum { LANES = 8, STRIPE = 64, STRIPES = 16, BLOCK = STRIPE * STRIPES, SECRET = 192 };
static const uint64_t PRIME32_1 = 0x9E3779B1, PRIME32_2 = 0x85EBCA77, PRIME32_3 = 0xC2B2AE3D;
static const uint64_t PRIME64_1 = 0x9E3779B185EBCA87, PRIME64_2 = 0xC2B2AE3D27D4EB4F, PRIME64_3 = 0x165667B19E3779F9;
static const uint64_t PRIME64_4 = 0x85EBCA77C2B2AE63, PRIME64_5 = 0x27D4EB2F165667C5;
static const uint8_t secret[SECRET] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4,
    0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e,
    0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43,
    0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb,
    0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19,
    0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7,
    0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78,
    0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16,
    0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static uint64_t little_endian(const uint8_t *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    return value;
}

/* Add stripes to the lanes, each with the secret from 8 bytes further on. */
static void accumulate(uint64_t *lanes, const uint8_t *stripes, const uint8_t *key, size_t number) {
    for (; number; number--, stripes += STRIPE, key += 8)
        for (int lane = 0; lane < LANES; lane++) {
            uint64_t value = little_endian(stripes + 8 * lane), mixed = value ^ little_endian(key + 8 * lane);
            lanes[lane ^ 1] += value;
            lanes[lane] += (mixed & 0xFFFFFFFF) * (mixed >> 32);
        }
}

static void scramble(uint64_t *lanes) {
    for (int lane = 0; lane < LANES; lane++) {
        lanes[lane] ^= lanes[lane] >> 47;
        lanes[lane] ^= little_endian(secret + SECRET - STRIPE + 8 * lane);
        lanes[lane] *= PRIME32_1;
    }
}

/* Add whole blocks to the lanes. */
static void add_blocks(uint64_t *lanes, const uint8_t *content, size_t number) {
    for (; number; number--, content += BLOCK) {
        accumulate(lanes, content, secret, STRIPES);
        scramble(lanes);
    }
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__)) && !defined(DICOM_NODE_PLAIN)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2"))) static inline
#define LOAD(at) _mm256_loadu_si256((const __m256i *)(at))

AVX2 __m256i accumulated(__m256i lanes, const uint8_t *stripe, const uint8_t *key) {
    __m256i value = LOAD(stripe), mixed = _mm256_xor_si256(value, LOAD(key));
    __m256i product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
    return _mm256_add_epi64(lanes, _mm256_add_epi64(product, _mm256_shuffle_epi32(value, 0x4E)));
}

AVX2 __m256i scrambled(__m256i lanes, const uint8_t *key) {
    const __m256i prime = _mm256_set1_epi64x((int64_t)PRIME32_1);
    lanes = _mm256_xor_si256(_mm256_xor_si256(lanes, _mm256_srli_epi64(lanes, 47)), LOAD(key));
    __m256i high = _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(lanes, 32), prime), 32);
    return _mm256_add_epi64(_mm256_mul_epu32(lanes, prime), high);
}

AVX2 void add_blocks_avx2(uint64_t *lanes, const uint8_t *content, size_t number) {
    __m256i low = LOAD(lanes), high = LOAD(lanes + 4);
    for (; number; number--) {
        for (int stripe = 0; stripe < STRIPES; stripe++, content += STRIPE) {
            low = accumulated(low, content, secret + 8 * stripe);
            high = accumulated(high, content + 32, secret + 8 * stripe + 32);
        }
        low = scrambled(low, secret + SECRET - STRIPE);
        high = scrambled(high, secret + SECRET - STRIPE + 32);
    }
    _mm256_storeu_si256((__m256i *)lanes, low);
    _mm256_storeu_si256((__m256i *)(lanes + 4), high);
}
#else
#define add_blocks_avx2 add_blocks
#define __builtin_cpu_supports(feature) 0
#endif

/* Return what lanes and secret come to, and write it, its highest byte first. */
static void merge(const uint64_t *lanes, const uint8_t *key, uint64_t sum, uint8_t *into) {
    for (int lane = 0; lane < LANES; lane += 2) {
        uint64_t one = lanes[lane] ^ little_endian(key + 8 * lane);
        uint64_t other = lanes[lane + 1] ^ little_endian(key + 8 * lane + 8);
        unsigned __int128 product = (unsigned __int128)one * other;
        sum += (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    sum ^= sum >> 37;
    sum *= 0x165667919E3779F9;
    sum ^= sum >> 32;
    for (int each = 0; each < 8; each++)
        into[each] = (uint8_t)(sum >> (56 - 8 * each));
}

/* Write the digest of `content`, which has more than 240 bytes. */
void dicom_node_digest(const uint8_t *content, size_t size, uint8_t *digest) {
    uint64_t lanes[LANES] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    size_t blocks = (size - 1) / BLOCK;
    (__builtin_cpu_supports("avx2") ? add_blocks_avx2 : add_blocks)(lanes, content, blocks);
    accumulate(lanes, content + blocks * BLOCK, secret, (size - 1 - blocks * BLOCK) / STRIPE);
    accumulate(lanes, content + size - STRIPE, secret + SECRET - STRIPE - 7, 1);
    merge(lanes, secret + SECRET - STRIPE - 11, ~(size * PRIME64_2), digest);
    merge(lanes, secret + 11, size * PRIME64_1, digest + 8);
}
