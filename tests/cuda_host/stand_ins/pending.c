/* Asynchronous copies out of page-locked memory: until the host has waited for one, it may not write what the copy reads.
 *
 * Copies are done at once here, so a source that is written too early does no harm; it is compared when it is waited for. */
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

typedef struct Pending {
  struct Pending *next;
  const void *stream, *source;
  size_t bytes;
  long place;
  char content[];
} Pending;

static Pending *pending;
static long num_places;

long place_in_streams(void) { return num_places; }

void add_pending(const void *source, size_t bytes, const void *stream) {
  Pending *copy = malloc(sizeof *copy + bytes);
  *copy = (Pending){pending, stream, source, bytes, ++num_places};
  memcpy(copy->content, source, bytes);
  pending = copy;
}

void settle_pending(const void *stream, long place) {
  for (Pending **link = &pending; *link;) {
    Pending *copy = *link;
    if (copy->place > place || (stream != NO_STREAM && copy->stream != stream)) {
      link = &copy->next;
      continue;
    }
    if (memcmp(copy->content, copy->source, copy->bytes))
      stand_in_record(
          "overwritten", cudaErrorUnknown, copy->stream, copy->bytes, "page-locked memory, under a copy that reads it"
      );
    *link = copy->next;
    free(copy);
  }
}

void forget_pending(const void *address, size_t bytes) {
  for (Pending **link = &pending; *link;) {
    Pending *copy = *link;
    if ((const char *)copy->source < (const char *)address || (const char *)copy->source >= (const char *)address + bytes) {
      link = &copy->next;
      continue;
    }
    *link = copy->next;
    free(copy);
  }
}
