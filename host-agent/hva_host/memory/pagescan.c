/*
 * What an epoch does to every page, in C because it is most of an epoch's time: in numpy and Python the same proof
 * takes about three times as long (benchmarks/epoch.py). Nothing here changes guest memory or the ledger.
 */
#define _GNU_SOURCE
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

/* A batch of guest pages and as many layer blocks stay in the second-level cache between reading and comparing. */
enum { PAGE = 4096, BATCH = 32 };

static const uint64_t NO_ENTRY = 0;

struct hva_layer {
	int32_t fd;
	/* Does the file system refuse RWF_NOWAIT? Then every read may wait. */
	int32_t may_wait;
	uint64_t seed;
	/* The entry of block 0; the entry of block n is n more. */
	uint64_t first_entry;
	uint64_t blocks;
	const uint64_t *fingerprints;
	uint64_t distinct;
	const uint64_t *sorted;
	const uint32_t *sorted_blocks;
};

static uint64_t fingerprint(const uint8_t *page, uint64_t seed)
{
	return XXH3_64bits_withSeed(page, PAGE, seed);
}

/* A page is all zeros if it begins with a zero byte and equals itself one byte on. */
static bool all_zero(const uint8_t *page)
{
	return page[0] == 0 && memcmp(page, page + 1, PAGE - 1) == 0;
}

/* XXH3-64 of each of n pages. */
EXPORT void hva_fingerprints(const uint8_t *pages, size_t n, uint64_t seed, uint64_t *out)
{
	for (size_t i = 0; i < n; i++)
		out[i] = fingerprint(pages + i * PAGE, seed);
}

/* out[i] = are pages i of a and b the same, byte for byte? */
EXPORT void hva_equal(const uint8_t *a, const uint8_t *b, size_t n, uint8_t *out)
{
	for (size_t i = 0; i < n; i++)
		out[i] = memcmp(a + i * PAGE, b + i * PAGE, PAGE) == 0;
}

/* out[i] = is page i all zeros? */
EXPORT void hva_all_zero(const uint8_t *pages, size_t n, uint8_t *out)
{
	for (size_t i = 0; i < n; i++)
		out[i] = all_zero(pages + i * PAGE);
}

/* A block with this fingerprint, or -1. The block behind the previous page's is preferred: files are read in order. */
static int64_t lookup(const struct hva_layer *layer, uint64_t wanted, int64_t previous)
{
	if (previous >= 0 && (uint64_t)previous + 1 < layer->blocks && layer->fingerprints[previous + 1] == wanted)
		return previous + 1;
	uint64_t low = 0, high = layer->distinct;
	while (low < high) {
		uint64_t middle = low + (high - low) / 2;
		if (layer->sorted[middle] < wanted)
			low = middle + 1;
		else
			high = middle;
	}
	if (low == layer->distinct || layer->sorted[low] != wanted || layer->sorted_blocks[low] >= layer->blocks)
		return -1;
	return layer->sorted_blocks[low];
}

/* The blocks the fingerprints propose, for the next lookups; -1 where there is none. */
EXPORT void hva_lookup(const struct hva_layer *layer, const uint64_t *wanted, size_t n, int64_t *blocks)
{
	int64_t previous = -1;
	for (size_t i = 0; i < n; i++)
		blocks[i] = previous = lookup(layer, wanted[i], previous);
}

/* Bytes read from the start of the run on; a read that would wait for the disk reads less. */
static size_t read_blocks(const struct hva_layer *layer, int64_t block, size_t n, uint8_t *into)
{
	size_t done = 0;
	while (done < n * PAGE) {
		struct iovec part = { into + done, n * PAGE - done };
		ssize_t got = preadv2(layer->fd, &part, 1, block * PAGE + (off_t)done, layer->may_wait ? 0 : RWF_NOWAIT);
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			break;
		done += (size_t)got;
	}
	return done;
}

/* Compare a batch of n pages with the layer's blocks. */
static void match(const struct hva_layer *layer, const uint8_t *pages, size_t n, uint8_t *copies, int64_t *previous,
		  uint64_t *entries, uint8_t *postponed)
{
	int64_t blocks[BATCH];
	for (size_t i = 0; i < n; i++) {
		blocks[i] = -1;
		if (entries[i] == NO_ENTRY)
			blocks[i] = *previous = lookup(layer, fingerprint(pages + i * PAGE, layer->seed), *previous);
	}
	for (size_t i = 0; i < n;) {
		size_t run = 1;
		if (blocks[i] < 0) {
			i++;
			continue;
		}
		while (i + run < n && blocks[i + run] == blocks[i] + (int64_t)run)
			run++;
		size_t have = read_blocks(layer, blocks[i], run, copies) / PAGE;
		for (size_t j = 0; j < run; j++) {
			if (j >= have)
				postponed[i + j] = 1;
			else if (memcmp(pages + (i + j) * PAGE, copies + j * PAGE, PAGE) == 0)
				entries[i + j] = layer->first_entry + (uint64_t)blocks[i + j];
		}
		i += run;
	}
}

/*
 * entries[i] = where page pfns[i] could come back from, 0 where from nowhere; postponed[i] = its block must be read
 * from the disk first. pfns ascend. scratch holds 2 * BATCH pages. Returns 0, or the errno of a failed read of RAM.
 */
EXPORT int hva_prove(int ram, const int64_t *pfns, size_t n, const struct hva_layer *layers, size_t n_layers,
		     uint64_t zero_entry, uint64_t *entries, uint8_t *postponed, uint8_t *scratch)
{
	uint8_t *pages = scratch, *copies = scratch + (size_t)BATCH * PAGE;
	int64_t previous[64];

	if (n_layers > 64)
		return EINVAL;
	for (size_t i = 0; i < n_layers; i++)
		previous[i] = -1;
	for (size_t start = 0; start < n; start += BATCH) {
		size_t batch = n - start < BATCH ? n - start : BATCH;
		for (size_t i = 0; i < batch;) {
			size_t run = 1;
			while (i + run < batch && pfns[start + i + run] == pfns[start + i] + (int64_t)run)
				run++;
			ssize_t got = pread(ram, pages + i * PAGE, run * PAGE, pfns[start + i] * PAGE);
			if (got != (ssize_t)(run * PAGE))
				return got < 0 ? errno : EIO;
			i += run;
		}
		for (size_t i = 0; i < batch; i++) {
			entries[start + i] = all_zero(pages + i * PAGE) ? zero_entry : NO_ENTRY;
			postponed[start + i] = 0;
		}
		for (size_t i = 0; i < n_layers; i++)
			match(&layers[i], pages, batch, copies, &previous[i], entries + start, postponed + start);
		for (size_t i = 0; i < batch; i++)
			postponed[start + i] &= entries[start + i] == NO_ENTRY;
	}
	return 0;
}
