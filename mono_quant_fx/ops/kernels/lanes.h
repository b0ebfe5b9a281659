/* A block is LANES words of a row, 8 LANES columns; lane l belongs to word l. How the lanes find their group. The including
 * file sets the target, and LANES, the 32-bit lanes of its vectors.
 */
#include "linear.h"

INLINE int64_t blocks_of(const mq_linear *a) { return ceil_div(a->columns, 8 * LANES); }

/* How the lanes of a block find their group: one for all, a few spread over the lanes, or looked up one by one. */
enum { ONE, SPREAD, LOOKUP };
typedef struct {
    int kind;
    int64_t span, per_block; /* blocks a group; groups a block */
    int32_t spread[16];
    int32_t *lookup; /* [blocks][LANES] */
} lanes;

/* A block and, for ONE, its group: counted, since a division a block would cost as much as the block. */
typedef struct {
    int64_t block, group, left;
} place;

INLINE place place_of(const lanes *l, int64_t block) {
    place p = {block, 0, 0};
    if (l->kind == ONE) p.group = block / l->span, p.left = l->span - block % l->span;
    return p;
}

INLINE void advance(const lanes *l, place *p) {
    p->block++;
    if (--p->left == 0) p->group++, p->left = l->span;
}

static int find_lanes(const mq_linear *a, lanes *l) {
    int64_t groups = groups_of(a), count = blocks_of(a) * LANES, group = groups == 1 ? a->columns : a->group;
    memset(l, 0, sizeof *l);
    if (groups == 1 || group % (8 * LANES) == 0) {
        l->kind = ONE, l->span = groups == 1 ? blocks_of(a) : group / (8 * LANES);
        return 1;
    }
    if (8 * LANES % group == 0) {
        l->kind = SPREAD, l->per_block = 8 * LANES / group;
        for (int i = 0; i < LANES; i++) l->spread[i] = 8 * i / group;
        return 1;
    }
    l->kind = LOOKUP, l->lookup = malloc(count * sizeof *l->lookup);
    if (!l->lookup) return 0;
    for (int64_t i = 0; i < count; i++) l->lookup[i] = least(8 * i / group, groups - 1);
    return 1;
}
