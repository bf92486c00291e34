/* What an epoch does to every page, in C because it is most of an epoch's time: benchmarks/pagescan.py has the figures. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
enum { PAGE = 4096 };

/* XXH3-64 of each of n pages. */
EXPORT void hva_fingerprints(const uint8_t *pages, size_t n, uint64_t seed, uint64_t *out)
{
	for (size_t i = 0; i < n; i++)
		out[i] = XXH3_64bits_withSeed(pages + i * PAGE, PAGE, seed);
}

/* out[i] = are pages i of a and b the same, byte for byte? */
EXPORT void hva_equal(const uint8_t *a, const uint8_t *b, size_t n, uint8_t *out)
{
	for (size_t i = 0; i < n; i++)
		out[i] = memcmp(a + i * PAGE, b + i * PAGE, PAGE) == 0;
}

/* out[i] = is page i all zeros? A page equals zero if it begins with a zero byte and equals itself one byte on. */
EXPORT void hva_all_zero(const uint8_t *pages, size_t n, uint8_t *out)
{
	for (size_t i = 0; i < n; i++) {
		const uint8_t *page = pages + i * PAGE;
		out[i] = page[0] == 0 && memcmp(page, page + 1, PAGE - 1) == 0;
	}
}
