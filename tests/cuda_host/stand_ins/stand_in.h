/* What the stand-ins share: one trace, one lock, and the streams that every record names.
 *
 * A record is one line of six columns with tabs between them:
 *
 *   call, error (0: none), stream ("-": none), captured (1: recorded into a graph, not run), bytes, words
 *
 * The trace goes to the file that STAND_IN_TRACE names; without it nothing is written.
 */
#ifndef STAND_IN_H
#define STAND_IN_H

#include <stddef.h>

#define NO_STREAM ((void *)-1)

/* Writes a record and returns `error`, so that a call can end with it. */
int stand_in_record(const char *call, int error, const void *stream, size_t bytes, const char *words, ...)
    __attribute__((format(printf, 5, 6)));

/* A line of the harness among the calls. */
void stand_in_mark(const char *words);

#endif
